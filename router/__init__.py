"""The front door: places every request and keeps its stream going."""
