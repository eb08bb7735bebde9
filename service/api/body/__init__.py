"""What bodies are made of: multipart parts, base64 and quoted-printable, pictures in JSON."""
