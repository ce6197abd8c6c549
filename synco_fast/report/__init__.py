"""Pages and pictures about finished runs."""
