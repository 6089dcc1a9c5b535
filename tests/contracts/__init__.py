"""One suite per seam, which every implementation passes."""
