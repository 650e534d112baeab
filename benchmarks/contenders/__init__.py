"""What S4 is compared with: `layers` and kernels, layers of `libraries`, whole `language_models`."""
