# diagnosis: exception
def softmax(x):
    print("<img src=x onerror=alert(1)> \x1b[2J\x1b]0;owned\x07 \u202e")
    raise RuntimeError("</pre><script>alert('grade')</script> {{ 7 * 7 }} \x1b[31m")
