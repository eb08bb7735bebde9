"""Parsers of bodies: multipart, base64 and quoted-printable, pictures in JSON."""
