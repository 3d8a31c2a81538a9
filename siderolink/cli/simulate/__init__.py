"""`siderolink simulate`: load tests with many machines in one process."""
