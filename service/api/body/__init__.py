"""The makings of bodies: multipart parts, base64 and quoted-printable, pictures in JSON."""
