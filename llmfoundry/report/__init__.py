"""`report.html`: a run's curves and its experts on one page that needs neither server nor network."""
