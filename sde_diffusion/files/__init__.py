"""*Bytes from anywhere.* Safe reading and atomic writing; this room knows no other."""
