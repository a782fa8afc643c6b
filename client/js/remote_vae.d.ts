/** Types of remote_vae.js, a client of remote-vae for Node and browsers. */

export type LatentDType = "float16" | "bfloat16" | "float32";
export type DType = LatentDType | "uint8";
/** float32 a Float32Array, uint8 a Uint8Array, float16 and bfloat16 their bits in a Uint16Array. */
export type Numbers = Float32Array | Uint16Array | Uint8Array;

/** Numbers with a shape, in C order. */
export class Tensor {
  /** `dtype` goes without saying for a Float32Array, Uint8Array and Float16Array. Throws RemoteVAEError, naming the argument. */
  constructor(data: Numbers | Uint8ClampedArray, shape: readonly number[], dtype?: DType);
  readonly data: Numbers;
  readonly shape: number[];
  readonly dtype: DType;
  /** Rounded to the nearest of `dtype`, which is float16 where nothing is said. */
  static fromFloat32(values: ArrayLike<number>, shape: readonly number[], dtype?: LatentDType): Tensor;
  /** Exactly; uint8 from 0 to 255. */
  toFloat32(): Float32Array;
}

export function float16ToFloat32(bits: ArrayLike<number>): Float32Array;
export function float32ToFloat16(values: ArrayLike<number>): Uint16Array;
export function bfloat16ToFloat32(bits: ArrayLike<number>): Float32Array;
export function float32ToBfloat16(values: ArrayLike<number>): Uint16Array;

/** Everything that goes wrong; but what an AbortSignal is aborted with is thrown as it is. */
export class RemoteVAEError extends Error {
  /** The stable word of docs/errors.md, such as `bad_request`, `overloaded`, `timed_out`, `connection_failed`. */
  readonly type: string;
  /** Of the answer, such as 503; null where there was none. */
  readonly status: number | null;
  /** The parameter that is at fault, in the words of the protocol, or an argument of this client. */
  readonly parameter: string | null;
  /** Seconds after which another try makes sense. */
  readonly retryAfter: number | null;
  /** The server's id of the request, for its log. */
  readonly requestId: string | null;
}

export interface Options {
  /** Of a server that asks for one; may stand in the URL instead, `http://:TOKEN@host:8000/demo`. */
  token?: string;
  /** Milliseconds for one try; null for as long as it takes. 300000 where nothing is said: a cold model loads weights first. */
  timeoutMs?: number | null;
  /** Milliseconds for all tries of a call and the pauses between; the server hears of it. */
  deadlineMs?: number | null;
  /** How often to try again where the server is busy or cannot be reached; null: 3 times or, with a deadline, until it. */
  retries?: number | null;
  /** Instead of the global one. */
  fetch?: typeof fetch;
}

export interface Call {
  /** Ends the call, and with it the server's work. */
  signal?: AbortSignal;
}

/** What neither shape nor configuration tells of latents: docs/models.md. Most need none. */
export interface Hints {
  numFrames?: number;
  layers?: number;
  dropFrames?: number;
  layout?: "channels_first" | "channels_last" | "frames_first";
  patchOrder?: "c_ph_pw" | "ph_pw_c";
  denormalized?: boolean;
  sigmaData?: number;
  decodeTimestep?: number;
  decodeNoiseScale?: number;
  decodeChunkSize?: number;
  forceNotQuantize?: boolean;
  /** 0 to 2**63 - 1. Sample k of a decode draws by seed + k. */
  seed?: number | bigint;
}

export interface Scaling {
  /** True: by the factors where they are given, else as the model's own pipeline does. True for a decode, false for an encode. */
  doScaling?: boolean;
  scalingFactor?: number;
  shiftFactor?: number;
}

export interface DecodeOptions extends Call, Hints, Scaling {
  /** `pil`, where nothing is said, a picture; `pt` the decoder's floats; `mp4` a video. */
  outputType?: "pil" | "pt" | "mp4";
  /** With `pt`: uint8 pixels, `[B, H, W, 3]` or `[T, H, W, 3]`. */
  partialPostprocess?: boolean;
  /** `jpg` where nothing is said; `png` is exact. */
  imageFormat?: "jpg" | "png";
  /** Pixels; of packed latents `[B, N, C]` only. */
  height?: number;
  width?: number;
  /** Frames a second of an mp4. */
  fps?: number;
}

export interface EncodeOptions extends Call, Hints, Scaling {
  sampleMode?: "sample" | "argmax" | "moments";
}

export interface Description {
  name: string;
  state: "cold" | "starting" | "ready" | "failed";
  [said: string]: unknown;
}

/** A model on a server. */
export class RemoteVAE {
  /** `endpoint` is the URL of a model, `http://host:8000/<model>`. */
  constructor(endpoint: string | URL, options?: Options);
  /** Latents `[B, C, h, w]`, `[C, h, w]`, packed `[B, N, C]`, or `[B, C, T, h, w]`. A batch of pictures is a list of Blobs. */
  decode(latents: Tensor, options: DecodeOptions & { outputType: "pt" }): Promise<Tensor>;
  decode(latents: Tensor, options: DecodeOptions & { outputType: "mp4" }): Promise<Blob>;
  decode(latents: Tensor, options?: DecodeOptions): Promise<Blob | Blob[]>;
  /** The file of a picture; or pixels, uint8 `[N, H, W, 3]` or floats in [-1, 1] `[B, 3, H, W]`. Gives latents `[B, C, h, w]`. */
  encode(image: Blob | ArrayBuffer | Uint8Array | Tensor, options?: EncodeOptions): Promise<Tensor>;
  /** Starts the model only with `wake`. */
  describe(options?: Call & { wake?: boolean }): Promise<Description>;
}

/** What a server (`http://host:8000`) says of each of its models; starts none of them. */
export function listModels(server: string | URL, options?: Options & Call): Promise<Description[]>;

export const DECODE_PARAMETERS: readonly string[];
export const ENCODE_PARAMETERS: readonly string[];
