"""The quantizer that transformers asks to open folders of ours."""
