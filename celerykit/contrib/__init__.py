"""
Doors to frameworks. Each is imported by who needs it, and by nobody else.
"""
