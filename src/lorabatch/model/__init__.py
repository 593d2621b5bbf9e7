"""The decoder, its linear layers and adapters, and the ways weights come in and go out."""
