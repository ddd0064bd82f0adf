"""Where to adapt (families, sites, targets) and where models come from (sources, pinned packages)."""
