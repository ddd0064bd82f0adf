"""What every room stands on: errors, registry, generators, files, protocols. Imports nothing else of deltaw."""
