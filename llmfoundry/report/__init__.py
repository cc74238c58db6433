"""`report.html`: what a run did and what its experts do, as one page without server or network."""
