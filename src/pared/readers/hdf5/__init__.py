"""Files of HDF5 and Keras."""
