"""Models and calibration texts of Hugging Face folders."""
