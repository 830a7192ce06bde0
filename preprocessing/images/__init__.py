"""From satellite images and outlines of parcels to a dataset folder; needs the geographic libraries."""
