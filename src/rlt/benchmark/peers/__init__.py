"""What the suites compare with: the plain way, other packages, padding."""
