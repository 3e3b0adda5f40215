"""What is deployed, and the scripts that derive and check it."""
