/**
 * A client of remote-vae for Node (18 or newer) and browsers: decode latents, encode pictures. One file, no dependencies.
 *
 *     const vae = new RemoteVAE("http://127.0.0.1:8000/demo");
 *     const picture = await vae.decode(Tensor.fromFloat32(latents, [1, 16, 64, 64]), { imageFormat: "png" });
 *
 * A page in a browser needs its origin among the server's `allow_origins`. Types, and what each argument means: remote_vae.d.ts.
 */

const SCALING = ["do_scaling", "scaling_factor", "shift_factor"];
const HINTS = [
  "num_frames", "layers", "drop_frames", "layout", "patch_order", "denormalized", "sigma_data", "decode_timestep",
  "decode_noise_scale", "decode_chunk_size", "force_not_quantize", "seed",
];
/** What a request may say in its query besides shape and dtype; a test holds it to what the server reads. */
export const DECODE_PARAMETERS = [
  ...SCALING, "output_type", "partial_postprocess", "image_format", "height", "width", "fps", ...HINTS,
];
export const ENCODE_PARAMETERS = [...SCALING, "sample_mode", ...HINTS];

const SEEDS = 2n ** 63n; // of a batch sample k draws noise by seed + k, whole or one by one; after the largest comes 0

// As transports/retry.py has it.
const TIMEOUT_MS = 300_000; // a cold model loads its weights before it answers
const RETRIES = 3;
const FIRST_PAUSE_MS = 500;
const LONGEST_BACKOFF_MS = 8_000; // where the server asks for nothing: it may be back at any moment
const LONGEST_PAUSE_S = 300; // a server that asks for more is not waited for
const LONGEST_TIMER_MS = 2 ** 31 - 1;
const WORTH_ANOTHER = ["unavailable", "overloaded", "model_starting", "connection_failed", "connection_lost"];
const WORTH_ANOTHER_BY_A_DEADLINE = ["timed_out", "deadline_exceeded"];

const OF_STATUS = {
  400: "bad_request", 401: "unauthorized", 404: "unknown_model", 405: "wrong_method", 408: "deadline_exceeded",
  413: "body_too_large", 415: "unknown_content_type", 429: "overloaded", 500: "internal_error", 503: "unavailable",
  504: "deadline_exceeded",
};
const DISTRUST = /CERT|SELF_SIGNED|UNABLE_TO_VERIFY|UNABLE_TO_GET_ISSUER/;

/** Everything that goes wrong but an AbortSignal of the caller's, whose reason is thrown as it is. */
export class RemoteVAEError extends Error {
  constructor(message, { type = "error", status = null, parameter = null, retryAfter = null, requestId = null, cause } = {}) {
    super(requestId ? `${message} (request ${requestId})` : message, cause === undefined ? undefined : { cause });
    this.name = "RemoteVAEError";
    Object.assign(this, { type, status, parameter, retryAfter, requestId });
  }
}

const ARRAYS = { float32: Float32Array, float16: Uint16Array, bfloat16: Uint16Array, uint8: Uint8Array };

/** Numbers with a shape: float32 in a Float32Array, uint8 in a Uint8Array, the bits of float16 and bfloat16 in a Uint16Array. */
export class Tensor {
  constructor(data, shape, dtype = dtypeOf(data)) {
    if (!Object.hasOwn(ARRAYS, dtype)) throw bad("dtype", `dtype is ${dtype}; expected one of ${Object.keys(ARRAYS).join(", ")}`);
    if (!Array.isArray(shape) || !shape.every((size) => Number.isSafeInteger(size) && size >= 0)) {
      throw bad("shape", `shape is ${JSON.stringify(shape)}; expected a list of whole numbers`);
    }
    const array = ARRAYS[dtype];
    if (!ArrayBuffer.isView(data) || data.BYTES_PER_ELEMENT !== array.BYTES_PER_ELEMENT) {
      throw bad("data", `data is ${data?.constructor?.name}; expected a ${array.name} for ${dtype}`);
    }
    const length = shape.reduce((product, size) => product * size, 1);
    if (data.length !== length) throw bad("shape", `shape ${JSON.stringify(shape)} has ${length} numbers, data ${data.length}`);
    this.data = data instanceof array ? data : new array(data.buffer, data.byteOffset, data.length); // Float16Array: its bits
    this.shape = [...shape];
    this.dtype = dtype;
  }

  /** A tensor of `dtype` out of numbers, rounded to the nearest. */
  static fromFloat32(values, shape, dtype = "float16") {
    const convert = { float32: (all) => Float32Array.from(all), float16: float32ToFloat16, bfloat16: float32ToBfloat16 };
    if (!(dtype in convert)) throw bad("dtype", `dtype is ${dtype}; expected ${Object.keys(convert).join(", ")}`);
    return new Tensor(convert[dtype](values), shape, dtype);
  }

  /** How a request says it. */
  get query() {
    return { shape: this.shape, dtype: this.dtype };
  }

  /** The numbers as a Float32Array, exactly; those of uint8 from 0 to 255. */
  toFloat32() {
    if (this.dtype === "float16") return float16ToFloat32(this.data);
    return this.dtype === "bfloat16" ? bfloat16ToFloat32(this.data) : Float32Array.from(this.data);
  }
}

function dtypeOf(data) {
  const dtype = { Float32Array: "float32", Uint8Array: "uint8", Uint8ClampedArray: "uint8", Float16Array: "float16" };
  const found = dtype[data?.constructor?.name];
  if (!found) throw bad("dtype", `dtype is missing; of ${data?.constructor?.name ?? data} it has to be said`);
  return found;
}

const asFloat = new Float32Array(1);
const asBits = new Uint32Array(asFloat.buffer);

/** Bits of float16 to the numbers they stand for. */
export function float16ToFloat32(bits) {
  return Float32Array.from(bits, (half) => {
    const sign = half & 0x8000 ? -1 : 1;
    const exponent = (half >> 10) & 0x1f;
    const fraction = half & 0x3ff;
    if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
}

/** Numbers to the bits of float16: to the nearest, half to even; above 65504 to infinity. */
export function float32ToFloat16(values) {
  return Uint16Array.from(values, (value) => {
    asFloat[0] = value;
    const sign = (asBits[0] >>> 16) & 0x8000;
    const size = Math.abs(asFloat[0]);
    if (Number.isNaN(size)) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00; // the middle between the largest and what would come next
    const exponent = size < 2 ** -14 ? -14 : ((asBits[0] >>> 23) & 0xff) - 127;
    const steps = roundHalfToEven(size / 2 ** (exponent - 10)); // exact: a division by a power of two
    return sign | (size < 2 ** -14 ? steps : ((exponent + 15) << 10) + (steps - 1024)); // 2048 steps carry into the exponent
  });
}

/** Bits of bfloat16 to the numbers they stand for: they are the upper half of a float32. */
export function bfloat16ToFloat32(bits) {
  return new Float32Array(Uint32Array.from(bits, (half) => (half << 16) >>> 0).buffer);
}

/** Numbers to the bits of bfloat16: to the nearest, half to even. */
export function float32ToBfloat16(values) {
  return Uint16Array.from(values, (value) => {
    asFloat[0] = value;
    return Number.isNaN(asFloat[0]) ? 0x7fc0 : (asBits[0] + 0x7fff + ((asBits[0] >>> 16) & 1)) >>> 16;
  });
}

function roundHalfToEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return below + (rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? 1 : 0);
}

/** A model on a server, by its URL, `http://host:8000/<model>`. */
export class RemoteVAE {
  #http;

  constructor(endpoint, options = {}) {
    this.#http = new Http(endpoint, options);
  }

  /** Latents to a Blob (a picture, or an mp4), a list of Blobs for a batch of pictures, or a Tensor with `outputType: "pt"`. */
  async decode(latents, { signal, ...options } = {}) {
    const tensor = latents instanceof Tensor ? latents : new Tensor(latents?.data, latents?.shape, latents?.dtype);
    const { do_scaling = true, ...said } = queryOf(options, DECODE_PARAMETERS);
    const { output_type = "pil", image_format = "jpg" } = said;
    const image = image_format === "png" ? "image/png" : "image/jpeg";
    const mediaType = new Map([["pil", image], ["mp4", "video/mp4"]]).get(output_type) ?? "tensor/binary";
    const query = { ...said, output_type, ...scalingOf(do_scaling, said) };
    if (mediaType.startsWith("image/")) query.image_format = image_format;
    const packed = said.height !== undefined && said.width !== undefined;
    const isBatch = tensor.shape.length === 4 || (tensor.shape.length === 3 && packed);
    const ask = (one, until, more = {}) => {
      return this.#http.result("", { ...query, ...one.query, ...more }, "tensor/binary", mediaType, one.data, until);
    };
    if (!mediaType.startsWith("image/") || !isBatch || tensor.shape[0] <= 1) return ask(tensor, signal);
    // One picture fits into one reply. Where one of them fails, the others are for nobody.
    const all = new AbortController();
    const forward = () => all.abort(signal.reason);
    if (signal?.aborted) forward();
    signal?.addEventListener("abort", forward);
    try {
      const seed = (at) => (said.seed === undefined ? {} : { seed: (BigInt(said.seed) + BigInt(at)) % SEEDS });
      return await Promise.all(samplesOf(tensor).map((one, at) => ask(one, all.signal, seed(at))));
    } finally {
      signal?.removeEventListener("abort", forward);
      all.abort();
    }
  }

  /** A picture's file (Blob, ArrayBuffer, Uint8Array) or pixels (Tensor) to latents, a Tensor `[B, C, h, w]`. */
  async encode(image, { signal, ...options } = {}) {
    const { do_scaling = false, ...said } = queryOf(options, ENCODE_PARAMETERS);
    const given = said.scaling_factor !== undefined || said.shift_factor !== undefined;
    const query = { sample_mode: "sample", ...said, ...scalingOf(do_scaling || given, said) };
    if (image instanceof Tensor) {
      return this.#http.result("encode", { ...query, ...image.query }, "tensor/binary", "tensor/binary", image.data, signal);
    }
    const file = image instanceof Blob ? await image.arrayBuffer() : image;
    if (!(file instanceof ArrayBuffer || file instanceof Uint8Array)) {
      const kind = image?.constructor?.name ?? image;
      throw bad("image", `image is ${kind}; expected a Blob, ArrayBuffer or Uint8Array of a file, or a Tensor`);
    }
    return this.#http.result("encode", query, "application/octet-stream", "tensor/binary", file, signal);
  }

  /** What the server says of the model; starts it only with `wake`. */
  async describe({ wake = false, signal } = {}) {
    return this.#http.json(wake ? "POST" : "GET", wake ? "describe" : "", signal);
  }
}

/** What a server (`http://host:8000`) says of each of its models; starts none of them. */
export async function listModels(server, { signal, ...options } = {}) {
  const { models } = await new Http(server, options).json("GET", "models", signal);
  if (!Array.isArray(models)) throw broken("The server has no list of models; is it the URL of a remote-vae server?");
  return models;
}

/** Requests with retries, timeout and deadline. */
class Http {
  constructor(endpoint, options) {
    const { token, timeoutMs = TIMEOUT_MS, deadlineMs = null, retries = null, fetch = globalThis.fetch, ...unknown } = options;
    const [stranger] = Object.keys(unknown);
    if (stranger) throw bad(stranger, `unknown option ${stranger}; known are token, timeoutMs, deadlineMs, retries, fetch`);
    this.url = urlOf(endpoint);
    this.token = token ?? (this.url.password ? unescaped(this.url.password) : undefined);
    this.url.username = this.url.password = ""; // which fetch refuses
    if (this.token !== undefined && !/^[\x21-\x7e]+$/.test(this.token)) {
      throw bad("token", "token is empty or holds a character that no header can");
    }
    for (const [name, value] of Object.entries({ timeoutMs, deadlineMs })) {
      if (value !== null && !(Number.isFinite(value) && value > 0 && value <= LONGEST_TIMER_MS)) {
        throw bad(name, `${name} is ${value}; expected milliseconds above 0, at most ${LONGEST_TIMER_MS}, or null`);
      }
    }
    if (retries !== null && !(Number.isInteger(retries) && retries >= 0)) {
      throw bad("retries", `retries is ${retries}; expected a whole number, 0 or more, or null`);
    }
    this.timeoutMs = timeoutMs;
    this.deadlineMs = deadlineMs;
    this.retries = retries ?? (deadlineMs === null ? RETRIES : Infinity);
    this.fetch = (...call) => fetch(...call); // a browser's own has to be called without a `this`
  }

  async result(below, query, contentType, accept, body, signal) {
    const headers = { "content-type": contentType, accept };
    return resultOf(await this.#withRetries({ method: "POST", headers, body }, below, query, signal), accept);
  }

  async json(method, below, signal) {
    const { bytes } = await this.#withRetries({ method, headers: { accept: "application/json" } }, below, {}, signal);
    const fields = parseJson(new TextDecoder().decode(bytes));
    if (fields !== null && typeof fields === "object") return fields;
    throw broken(`${this.url} did not describe itself; is it the URL of a remote-vae server?`);
  }

  async #withRetries(request, below, query, signal) {
    const giveUp = this.deadlineMs === null ? Infinity : performance.now() + this.deadlineMs;
    for (let failed = 0; ; ) {
      signal?.throwIfAborted();
      const leftMs = Math.min(giveUp - performance.now(), this.timeoutMs ?? Infinity);
      try {
        if (leftMs <= 0) throw late(`The deadline of ${this.deadlineMs} ms passed before the server could be asked`);
        return await this.#once(request, urlBelow(this.url, below, query), leftMs, signal);
      } catch (error) {
        if (!(error instanceof RemoteVAEError)) throw error;
        failed += 1;
        const asked = error.retryAfter ?? 0;
        if (!this.#isWorthAnother(error) || asked > LONGEST_PAUSE_S || failed > this.retries) throw error;
        const backoff = Math.min(FIRST_PAUSE_MS * 2 ** (failed - 1), LONGEST_BACKOFF_MS);
        const pause = Math.max(asked * 1000, backoff) * (1 + Math.random() / 4); // so that clients do not come back all at once
        if (performance.now() + pause >= giveUp) throw error;
        await sleep(pause, signal);
      }
    }
  }

  #isWorthAnother({ type, retryAfter }) {
    if (type === "unknown_route") return retryAfter !== null; // a proxy that is coming up says when it will know
    return WORTH_ANOTHER.includes(type) || (this.deadlineMs !== null && WORTH_ANOTHER_BY_A_DEADLINE.includes(type));
  }

  /** Headers and bytes of a 2xx. */
  async #once({ headers, ...request }, url, leftMs, signal) {
    const ours = new AbortController();
    const granted = `timeout ${this.timeoutMs} ms, deadline ${this.deadlineMs} ms`;
    const giveUp = () => ours.abort(late(`${this.url} did not answer in time (${granted})`));
    const timer = leftMs === Infinity ? undefined : setTimeout(giveUp, leftMs);
    const forward = () => ours.abort(signal.reason);
    signal?.addEventListener("abort", forward);
    const sent = { ...headers };
    if (this.token !== undefined) sent.authorization = `Bearer ${this.token}`;
    if (leftMs !== Infinity && request.method === "POST") sent["x-vae-deadline-ms"] = String(Math.max(1, Math.floor(leftMs)));
    let answer;
    try {
      answer = await this.fetch(url, { ...request, headers: sent, signal: ours.signal });
      const bytes = await answer.arrayBuffer();
      if (!answer.ok) throw errorOf(answer.status, answer.headers, new TextDecoder().decode(bytes));
      return { headers: answer.headers, bytes };
    } catch (error) {
      if (error instanceof RemoteVAEError) throw error;
      if (ours.signal.aborted) throw ours.signal.reason;
      throw this.#lost(error, answer !== undefined);
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", forward);
    }
  }

  #lost(cause, hasBegun) {
    const code = cause?.cause?.code ?? "";
    const error = (type, message) => new RemoteVAEError(`${this.url} ${message}`, { type, cause });
    if (hasBegun) return error("connection_lost", "broke off in the middle of its answer");
    if (DISTRUST.test(code)) return error("untrusted_certificate", `has a certificate that is not trusted here (${code})`);
    // A browser does not say which of the two it is.
    const page = typeof document === "undefined" ? "" : `, and does it allow ${globalThis.origin} (allow_origins)`;
    return error("connection_failed", `cannot be reached; is the server running${page}?`);
  }
}

/** As it is where it has a `%` that stands for itself. */
function unescaped(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function urlOf(endpoint) {
  let url;
  try {
    url = new URL(endpoint);
  } catch {
    url = undefined;
  }
  if (url?.protocol === "http:" || url?.protocol === "https:") return url;
  throw bad("endpoint", "endpoint is no URL such as http://127.0.0.1:8000/demo"); // not said back: a token may stand in it
}

/** The URL of a path below the endpoint's, or the endpoint itself where it already ends so. */
function urlBelow(endpoint, below, query) {
  const url = new URL(endpoint);
  const trunk = url.pathname.replace(/\/+$/, "");
  if (below && !trunk.endsWith(`/${below}`)) url.pathname = `${trunk.replace(/\/decode$/, "")}/${below}`;
  for (const [name, value] of Object.entries(query)) for (const one of [value].flat()) url.searchParams.append(name, one);
  return url;
}

/** Options by the protocol's names: `numFrames` is `num_frames`. */
function queryOf(options, known) {
  const query = {};
  for (const [option, value] of Object.entries(options)) {
    const name = option.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
    if (!known.includes(name)) throw bad(option, `unknown option ${option}; known are ${known.join(", ")}, in camelCase`);
    if (value !== undefined && value !== null) query[name] = value;
  }
  const { seed = 0 } = query;
  if ((typeof seed !== "bigint" && !Number.isSafeInteger(seed)) || seed < 0 || seed >= SEEDS) {
    throw bad("seed", `seed is ${seed}; expected a whole number from 0 to 2**63 - 1, above 2**53 - 1 as a BigInt`);
  }
  return query;
}

function scalingOf(doScaling, { scaling_factor, shift_factor }) {
  const given = scaling_factor !== undefined || shift_factor !== undefined;
  return doScaling && given ? {} : { do_scaling: Boolean(doScaling) };
}

function samplesOf({ data, shape: [count, ...rest], dtype }) {
  const size = data.length / count;
  return Array.from({ length: count }, (_, at) => new Tensor(data.subarray(at * size, (at + 1) * size), [1, ...rest], dtype));
}

function resultOf({ headers, bytes }, accept) {
  const type = (headers.get("content-type") ?? "").split(";")[0].trim().toLowerCase();
  const isOfTheKind = accept.startsWith("tensor/") === type.startsWith("tensor/");
  if (!isOfTheKind) throw broken(`The reply is ${type || "of no type"}; asked for was ${accept}`);
  if (type.startsWith("image/") || type.startsWith("video/")) return new Blob([bytes], { type });
  const shape = parseJson(headers.get("shape"));
  const dtype = headers.get("dtype");
  try {
    if (!Object.hasOwn(ARRAYS, dtype ?? "")) throw bad("dtype", `dtype ${dtype}`);
    return new Tensor(new ARRAYS[dtype](bytes), shape, dtype);
  } catch (cause) {
    throw broken(`The reply (${type || "no Content-Type"}) is not one of this protocol: ${cause.message}`, cause);
  }
}

/** The error that an answer other than 2xx stands for; answers of strangers (a proxy's page) included. */
function errorOf(status, headers, text) {
  const fields = parseJson(text);
  const seconds = headers.get("retry-after");
  let retryAfter = /^\d+(\.\d+)?$/.test(seconds ?? "") ? Number(seconds) : null;
  let type = OF_STATUS[status] ?? (status < 500 ? "bad_request" : "internal_error");
  let requestId = headers.get("x-request-id");
  if (typeof fields?.error === "string") {
    type = typeof fields.code === "string" ? fields.code : type;
    requestId = fields.request_id ?? requestId;
    return new RemoteVAEError(fields.error, { type, status, parameter: fields.parameter ?? null, retryAfter, requestId });
  }
  if (status === 500 && text === "Internal Server Error") type = "unavailable"; // Serve's: who should have answered has died
  if (status === 404 && text.includes("/-/routes")) [type, retryAfter] = ["unknown_route", retryAfter ?? 1]; // Serve's: coming up
  const said = text.replace(/\s+/g, " ").trim().slice(0, 200) || "an empty body";
  const message = `The server answered ${status} and no error of this protocol: ${said}`;
  return new RemoteVAEError(message, { type, status, retryAfter, requestId });
}

const bad = (parameter, message) => new RemoteVAEError(message, { type: "bad_request", parameter });
const late = (message) => new RemoteVAEError(message, { type: "timed_out" });
const broken = (message, cause) => new RemoteVAEError(message, { type: "broken_reply", cause });

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal?.removeEventListener("abort", stop), resolve()), Math.min(ms, LONGEST_TIMER_MS));
    signal?.addEventListener("abort", stop, { once: true });
  });
}
