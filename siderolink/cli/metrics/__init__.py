"""`--metrics-listen`: Prometheus metrics, /healthz and /readyz of a running command (docs/metrics.md)."""
