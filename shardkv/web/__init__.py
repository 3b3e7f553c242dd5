"""The page that a controller shows to browsers: what the cluster looks like, live, and nothing to change."""
