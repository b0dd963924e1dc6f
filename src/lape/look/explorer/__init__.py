"""The explorer: one HTML file for the browser."""
