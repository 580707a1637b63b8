"""The demo model that ships with Tandem, and the scripts that train it."""
