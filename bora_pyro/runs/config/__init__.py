"""What a run can be told: the options, their groups, and the command line that reads them."""
