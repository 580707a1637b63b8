"""Workers that continue requests token by token."""
