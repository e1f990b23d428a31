"""Programs that run inside guests: Python 3.9, standard library only, each a file by itself, read and sent by
`program`.
"""
