"""Makes datasets: pictures, drawn or from a folder, encoded into shards with Energon's metadata."""
