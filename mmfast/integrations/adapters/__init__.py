"""The adapters of Hugging Face transformers, a family of models a file.

Each is a mixin that goes before the class it speeds up and that imports nothing of transformers;
`mmfast.integrations.registry` says which class gets which.
"""
