"""`siderolink simulate`: many machines in one process, for load."""
