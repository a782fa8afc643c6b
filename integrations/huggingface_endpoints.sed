# The addresses of Hugging Face's endpoints, as older clients hold them, and what stands for each here:
#     sed -i -f huggingface_endpoints.sed <the client's file>
# Put your server in place of 127.0.0.1:8000. docs/clients.md says which files, and for what each address was. No client sends what
# follows a `#`: the ComfyUI node HFRemoteVAE takes that for videos whose address has the word HunyuanVideo in it.
s|https://q1bj3bpq6kzilnsu[^'"]*|http://127.0.0.1:8000/sd-v1|
s|https://x2dmsqunjd6k9prw[^'"]*|http://127.0.0.1:8000/sd-xl|
s|https://whhx50ex1aryqvw6[^'"]*|http://127.0.0.1:8000/flux|
s|https://o7ywnmrahorts457[^'"]*|http://127.0.0.1:8000/hunyuan-video#HunyuanVideo|
s|https://qc6479g0aac6qwy9[^'"]*|http://127.0.0.1:8000/sd-v1|
s|https://xjqqhmyn62rog84g[^'"]*|http://127.0.0.1:8000/sd-xl|
s|https://ptccx55jz97f9zgo[^'"]*|http://127.0.0.1:8000/flux|
