// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { expect, it } from 'vitest';

import { afterGreeting, dataFrame, greetingFrame, sizeFrame } from './protocol';

const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

it('frames keys by their length in bytes', () => {
  expect(text(dataFrame('id\r'))).toBe('0:3:id\r');
  expect(text(dataFrame('ä€'))).toBe('0:5:ä€');
});

it('frames size and greeting', () => {
  expect(text(sizeFrame(80, 24))).toBe('1:80:24:');
  expect(text(greetingFrame('root@pam', 'PVEVNC:1::x'))).toBe('root@pam:PVEVNC:1::x\n');
});

it('tells the OK, with what follows it, from a refusal', () => {
  const bytes = (value: string) => new TextEncoder().encode(value);
  expect(text(afterGreeting(bytes('OKlogin:'))!)).toBe('login:');
  expect(afterGreeting(bytes('authentication failed'))).toBeNull();
});
