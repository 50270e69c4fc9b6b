// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Frames of a terminal over the API's websocket. The client's are text: `0:LENGTH:DATA` for keys (length in bytes),
// `1:COLUMNS:ROWS:` for the size, `2` to stay alive; the first one is `USER:TICKET\n`, answered by `OK`. The server's
// are the terminal's bytes as they are.

const encoder = new TextEncoder();

function frame(head: string, data: Uint8Array = new Uint8Array()): Uint8Array<ArrayBuffer> {
  const headBytes = encoder.encode(head);
  const joined = new Uint8Array(headBytes.length + data.length);
  joined.set(headBytes);
  joined.set(data, headBytes.length);
  return joined;
}

export function greetingFrame(user: string, ticket: string): Uint8Array<ArrayBuffer> {
  return frame(`${user}:${ticket}\n`);
}

export function dataFrame(text: string): Uint8Array<ArrayBuffer> {
  const data = encoder.encode(text);
  return frame(`0:${data.length}:`, data);
}

export function sizeFrame(columns: number, rows: number): Uint8Array<ArrayBuffer> {
  return frame(`1:${columns}:${rows}:`);
}

export function aliveFrame(): Uint8Array<ArrayBuffer> {
  return frame('2');
}

/** The server's first bytes: an OK, then perhaps already output. Null when it is a refusal. */
export function afterGreeting(bytes: Uint8Array): Uint8Array | null {
  return bytes[0] === 0x4f && bytes[1] === 0x4b ? bytes.subarray(2) : null;
}
