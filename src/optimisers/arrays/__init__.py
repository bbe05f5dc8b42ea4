"""Which library is this array from?"""
