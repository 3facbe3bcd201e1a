"""Find training documents that contain items chateval scores."""
