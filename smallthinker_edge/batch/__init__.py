"""One task over the lines of a file: in this process, in several, or over a Dask cluster. Called by `map`."""
