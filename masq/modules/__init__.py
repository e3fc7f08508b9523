"""What replaces a float linear, and how it learns the modality of every token."""
