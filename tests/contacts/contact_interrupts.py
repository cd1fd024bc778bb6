def run(contact):
    return "right"
