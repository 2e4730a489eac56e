"""Traffic over time: scrapes of /metrics become increases, and these a bounded history. Knows no HTTP and no store."""
