"""Traffic over time: scrapes of /metrics become increases, and these a bounded history; without HTTP or the store."""
