"""Images: preprocessing, folders, and the embedded sample."""
