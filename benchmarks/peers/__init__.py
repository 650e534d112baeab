"""What S4 is compared with: layers and kernels in `layers`, whole models of language in `language_models`."""
