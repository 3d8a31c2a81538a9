"""The wire: gRPC calls in, statuses out. Parses, bounds and answers; decides nothing."""
