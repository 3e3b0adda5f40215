"""The cache in libraries that people load models with. Each module needs its library, and loads it when used."""
