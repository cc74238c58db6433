"""What a run will hold, send and take, said before a GPU is rented."""
