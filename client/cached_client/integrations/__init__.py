"""The cache in engines and libraries that people load models with. Each module needs its library; none loads it early."""
