"""The public functions: docstring, validation, schema, fake tensors, autograd."""
