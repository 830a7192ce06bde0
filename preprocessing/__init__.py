"""Makes dataset folders in the published format."""
