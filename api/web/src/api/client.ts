// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// One HTTP call to the API: form-encoded parameters in, the envelope's `data` out, errors as ApiError.
// It knows no route; queries.ts and the components name the paths.
import { session } from './session';

export type Method = 'GET' | 'POST' | 'PUT' | 'DELETE';
export type Value = string | number | boolean | undefined;
export type Parameters = Record<string, Value>;

/** The API refused a call, or could not be reached (status 0). */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    /** What is wrong with each parameter, by name. */
    readonly errors: Record<string, string> = {},
  ) {
    super(message);
    this.name = 'ApiError';
  }
}

/** Text of any error for people; per-parameter texts follow when no field shows them. */
export function errorText(error: unknown, withParameters = true): string {
  if (!(error instanceof Error)) return String(error);
  if (!withParameters || !(error instanceof ApiError)) return error.message;
  const details = Object.entries(error.errors).map(([name, text]) => `${name}: ${text}`);
  return [error.message, ...details].join('\n');
}

/** Builds a path below /api2/json; each inserted value is escaped: path`/nodes/${node}/qemu`. */
export function path(texts: TemplateStringsArray, ...values: (string | number)[]): string {
  return texts.reduce((built, text, index) => built + encodeURIComponent(values[index - 1] ?? '') + text);
}

function encode(parameters: Parameters): URLSearchParams {
  const encoded = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value === undefined) continue;
    encoded.set(name, typeof value === 'boolean' ? (value ? '1' : '0') : String(value));
  }
  return encoded;
}

function statusText(response: Response): string {
  return response.statusText || `the node answered with status ${response.status}`;
}

/** Turns an answer that is not a success into an ApiError. */
export function refusal(status: number, reason: string, body: unknown): ApiError {
  const { message, errors } = (body ?? {}) as { message?: string; errors?: Record<string, string> };
  const texts = Object.fromEntries(Object.entries(errors ?? {}).map(([name, text]) => [name, text.trim()]));
  return new ApiError(status, (message ?? reason).trim() || reason, texts);
}

/** Calls the API and returns the envelope itself; `call` is what almost everyone wants. */
export async function envelope<T>(
  method: Method,
  target: string,
  parameters: Parameters = {},
  signal?: AbortSignal,
): Promise<{ data: T; total?: number }> {
  const encoded = encode(parameters);
  const inBody = method === 'POST' || method === 'PUT';
  const query = inBody || encoded.size === 0 ? '' : `?${encoded}`;
  const headers: Record<string, string> = {};
  const csrf = session.current?.csrf;
  if (method !== 'GET' && csrf) headers['CSRFPreventionToken'] = csrf;
  let response: Response;
  try {
    response = await fetch(`/api2/json${target}${query}`, { method, headers, body: inBody ? encoded : null, signal: signal ?? null });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, 'The node does not answer. It may be restarting, or the network is down.');
  }
  const body: unknown = await response.json().catch(() => null);
  if (response.ok && body !== null) return body as { data: T; total?: number };
  if (response.status === 401 && target !== '/access/ticket') session.end('Your session has ended; sign in again.');
  throw refusal(response.status, statusText(response), body);
}

/** Calls the API and returns the answer's data. */
export async function call<T>(method: Method, target: string, parameters: Parameters = {}, signal?: AbortSignal): Promise<T> {
  return (await envelope<T>(method, target, parameters, signal)).data;
}

/** Sends a file; `progress` gets the fraction sent. Resolves to the task's UPID. */
export function upload(
  target: string,
  fields: Record<string, string>,
  file: File,
  progress: (fraction: number) => void,
  signal: AbortSignal,
): Promise<string> {
  const form = new FormData();
  // The API reads the fields before the file, so that it can refuse before the bytes arrive.
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append('filename', file, file.name);
  return new Promise((resolve, reject) => {
    // fetch() reports no upload progress.
    const request = new XMLHttpRequest();
    request.open('POST', `/api2/json${target}`);
    request.setRequestHeader('CSRFPreventionToken', session.current?.csrf ?? '');
    request.responseType = 'json';
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onerror = () => reject(new ApiError(0, 'The upload was cut off before it was complete.'));
    request.onabort = () => reject(new ApiError(0, 'The upload was cancelled.'));
    request.onload = () => {
      if (request.status === 200) resolve((request.response as { data: string }).data);
      else reject(refusal(request.status, request.statusText || `status ${request.status}`, request.response));
    };
    signal.addEventListener('abort', () => request.abort());
    request.send(form);
  });
}
