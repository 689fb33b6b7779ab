TORCH: str  # the version of torch that mylayers._C was compiled against; setup.py writes it
