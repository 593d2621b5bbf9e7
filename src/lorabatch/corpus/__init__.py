"""From files to documents to token ids to packed blocks."""
